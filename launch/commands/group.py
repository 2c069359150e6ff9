"""A group of commands that suggests similar names for a mistyped one."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from typer.core import TyperGroup


class CommandGroup(TyperGroup):
    """A group whose error for an unknown command names similar ones."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first argument names."""
        if args[0] not in self.commands and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"No such command {args[0]!r}{did_you_mean(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


class ListingGroup(CommandGroup):
    """A group that lists when no command is named: `runs`, `runs FOLDER` and `runs --json` are `runs list ...`.

    A folder with the name of a command is given as ./rm.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `list` before arguments that name no command."""
        words = [word for word in args if not word.startswith("-")]
        is_named = bool(words) and words[0] in self.commands
        # `runs --help` is about the group. While the shell completes the first word, it is offered the commands.
        is_about_group = not words and (ctx.resilient_parsing or any(word in ctx.help_option_names for word in args))
        if not is_named and not is_about_group:
            args = ["list", *args]
        return super().parse_args(ctx, args)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the known words that a mistyped one may mean, as the end of a message; empty if none is similar."""
    names = {name.lstrip("-"): name for name in known}
    typed = word.lstrip("-")
    similar = [name for name in names if typed and name.startswith(typed)] or get_close_matches(typed, names)
    return f" (did you mean {' or '.join(names[name] for name in similar)}?)" if similar else ""
