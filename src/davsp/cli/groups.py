"""Options that stand together: a frozen dataclass is one parameter of a command, and so many options to its user.

    @dataclass(frozen=True)
    class ModelOptions:
        panel: ClassVar[str] = "Model"                         # the heading in --help
        device: Annotated[str | None, typer.Option()] = None   # --device

    def serve(model: ModelOptions, port: int = 8000) -> None: ...
    add(app, serve)

The names of the fields are those of the options, so no two groups of one command may share one.
"""

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

OWN = "Options"  # the panel of options that are in no group
WIDEST = 20  # columns of an option with its second name on one line


def add(app: typer.Typer, command: Callable[..., None], name: str | None = None) -> None:
    """Make a function a command of `app`, called by its own name or by `name`."""
    app.command(name or command.__name__.replace("_", "-"), cls=Command)(grouped(command))


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The same command with each dataclass among its parameters spread into its fields, an option each."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            options += _spread(groups[parameter.name])
        else:
            options.append(parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY))

    @wraps(command)
    def run(**values: Any) -> None:
        built = {name: kind(**{f.name: values.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        command(**values, **built)

    del run.__wrapped__  # typer would read the parameters of what stands behind it
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


def _spread(kind: Any) -> list[inspect.Parameter]:
    """A parameter for each field of a group, in the group's panel."""
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=_in_panel(hints[field.name], kind.panel),
        )
        for field in fields(kind)
    ]


def _in_panel(hint: Any, panel: str) -> Any:
    """The annotation of a field, its option with the heading that it stands under."""
    (option,) = hint.__metadata__
    option = copy(option)
    option.rich_help_panel = panel
    return Annotated[hint.__origin__, option]


def chosen(options: Any) -> dict[str, Any]:
    """Name -> value of what the user gave of a group: its fields that are not None."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if value is not None}


def changed(options: Any) -> dict[str, Any]:
    """Name -> value of the fields of a group that are not as they are when left out."""
    return {f.name: value for f in fields(options) if (value := getattr(options, f.name)) != f.default}


class Command(TyperCommand):
    """A command whose help has two columns, names and descriptions, under a heading for each group.

    Typer's own table has a column for types as well, and at 80 columns a third of the width or less is left for words.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from rich.console import Console
        from rich.padding import Padding
        from rich.text import Text

        console = Console(highlight=False)
        console.print(Padding(Text(self.get_usage(ctx)), (1, 1, 0, 1)))
        console.print(Padding(Text(" ".join((self.help or "").split())), 1))
        for panel, rows in self._panels(ctx).items():
            console.print(_panel(panel, rows))

    def _panels(self, ctx: Any) -> dict[str, list[tuple[str, str]]]:
        """Heading -> names and description of each option; arguments first, then what is in no group."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], OWN: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:  # hidden
                continue
            description = record[1].replace("\\[", "[")  # older releases of typer escape it for rich
            if parameter.param_type_name == "argument":
                panels["Arguments"].append((" ".join(parameter.get_usage_pieces(ctx)), description))
            else:
                names = ", ".join([*parameter.opts, *parameter.secondary_opts])
                names = names if len(names) <= WIDEST else names.replace(" ", "\n")
                panel = getattr(parameter, "rich_help_panel", None)  # --help is click's own
                panels.setdefault(panel or OWN, []).append((names, description))
        return {name: rows for name, rows in panels.items() if rows}


def _panel(title: str, rows: list[tuple[str, str]]) -> Any:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(ratio=1)
    for names, description in rows:
        table.add_row(Text(names), Text(description))
    return Panel(table, title=title, title_align="left", border_style="dim")
