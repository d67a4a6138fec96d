"""What ``bnbp train-bench`` measures: whole training steps in PyTorch, beside those of converted networks.

A candidate is PyTorch as it is, PyTorch with ``torch.compile``, or the network that ``bnbp.torch.convert`` returns.
What is timed is a step: forward pass, loss, backward pass and SGD. All candidates of a network are timed in one
process, in turns, from the same weights and on the same data. None is timed before its gradients have been compared
with those of the network in float64. A file uses only those below it in this list, and what ``benchmark/`` has for the
machine and for taking turns:

``plot.py``
    The picture.
``report.py``
    What is made of the rows: ratios, cells of tables, JSON.
``measure.py``
    The measurement: gradients checked, the candidates timed in turns, losses compared.
``memory.py``
    The peak memory of a step, in a process of its own.
``steps.py``
    A candidate: its networks, data, losses and steps.
``cases.py``
    What is measured, and what comes of it: networks and their batches, candidates, rows. It needs no PyTorch.
``networks.py``
    The networks.
"""
