"""What ``bnbp bench`` measures: the operators, beside the floor of the machine and other implementations.

All candidates of a row are timed in one process, in turns, on the same arrays: what disturbs one, or slows the machine
down for a while, disturbs the others as well. None is timed before its answer has been compared with
:mod:`bnbp.reference`. A file uses only those below it in this list:

``plot.py``
    The picture.
``report.py``
    What is made of the rows: totals, remarks, JSON.
``measure.py``
    The measurement: every answer checked, then the candidates timed in turns.
``peers.py``
    Other implementations, imported when they are asked for.
``candidates.py``
    What is timed of bnbp: the operators, and the floor.
``points.py``
    What a row is about: the shapes, and arrays of them.
``machine.py``
    What it runs on.
"""
