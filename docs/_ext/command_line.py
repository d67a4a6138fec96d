"""The commands of a Typer application with their arguments and options, as their own help has them.

They are written while the pages are built. Each command is a section; each option is one of Sphinx's, which the search
and the index know.

.. code-block:: rst

   .. command-line:: bnbp.cli app
      :prog: bnbp
"""

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, ClassVar

import typer
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.rst import escape


class CommandLine(SphinxDirective):
    """The commands of the application that a module has under a name."""

    required_arguments = 2
    option_spec: ClassVar[dict[str, Any]] = {"prog": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        module, name = self.arguments
        group = typer.main.get_command(getattr(import_module(module), name))
        for each, loaded in sys.modules.items():
            if each == module or each.startswith(f"{module}."):
                self.env.note_dependency(str(loaded.__file__))
        context = typer.Context(group, info_name=self.options["prog"])  # type: ignore[arg-type]
        lines = list(parameters(group, context))
        for command in group.commands.values():  # type: ignore[attr-defined]
            lines += section(command, typer.Context(command, info_name=command.name, parent=context))
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def section(command: Any, context: Any) -> Iterator[str]:
    """What there is to say of a command."""
    title = context.command_path
    yield from ("", title, "-" * len(title), "")
    yield from (".. code-block:: console", "", f"   $ {title} {' '.join(command.collect_usage_pieces(context))}", "")
    for paragraph in inspect.cleandoc(command.help).split("\n\n"):
        yield from (marked_up(" ".join(paragraph.split())), "")
    yield from parameters(command, context)


def parameters(command: Any, context: Any) -> Iterator[str]:
    """The arguments and options of a command but for ``--help``, which all have."""
    yield from ("", f".. program:: {context.command_path}", "")
    for parameter in command.get_params(context):
        if "--help" in parameter.opts:
            continue
        value = value_of(parameter, context)
        is_argument = parameter.param_type_name == "argument"
        names = [value] if is_argument else [f"{name} {value}".strip() for name in names_of(parameter)]
        text = marked_up(parameter.help)
        if default := default_of(parameter):
            text += f" Default: {default}."
        elif parameter.required:
            text += " Required."
        yield from (f".. option:: {', '.join(names)}", "", f"   {text}", "")


def names_of(parameter: Any) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


def value_of(parameter: Any, context: Any) -> str:
    """What the help shows for an option's value: N, or the words to choose from; nothing for a flag."""
    if parameter.metavar is not None:
        return str(parameter.metavar)
    shown = str(parameter.display_type_rich(ctx=context) or "").strip("<>")
    return shown.removeprefix("list[").removesuffix("]")


def default_of(parameter: Any) -> str:
    """The default in words or as it is typed; of a flag there is none, unless it has two names."""
    shown, default = getattr(parameter, "show_default", None), parameter.default
    if isinstance(shown, str):
        return escape(shown)
    if default is None or isinstance(default, bool):
        return f"``{parameter.opts[0]}``" if parameter.secondary_opts else ""
    return f"``{default}``"


def marked_up(text: str) -> str:
    """Text in Markdown as reStructuredText: what is between backticks is code, and nothing else is markup."""
    code = re.split(r"`([^`]*)`", text)
    return "".join(f"``{part}``" if k % 2 else escape(part) for k, part in enumerate(code))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
