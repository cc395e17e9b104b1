"""``FlexibleArgumentParser``: argparse with what vLLM's users expect of its command line.

Options come as ``Flag`` entries. On top of argparse: underscores and dashes are the same, switches
have a ``--no-`` twin, JSON options take dotted keys, ``--config`` reads YAML, help comes by group
or by option, options that vLLM has and this engine lacks are refused by name, those it had once
with what to use now, and an unknown option is answered with the nearest real one. All options
that are refused are named at once, each in one line, with exit status 2.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from vllm.errors import ConfigError, UnsupportedError, VLLMValidationError
from vllm.utils.flags import Flag, Kind, NotYet, nearest

__all__ = ["FlexibleArgumentParser"]

_JSON_NOTE = (
    "JSON options also take dotted keys: --json-arg.key1 value --json-arg.key2.key3 value; "
    "a trailing + adds to a list: --json-arg.key4+ value."
)


class _StoreFlag(argparse.Action):
    """Stores what the flag makes of the text; its errors pass through argparse untouched."""

    def __init__(self, *args: Any, flag: Flag, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flag = flag

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        flag = self.flag
        if flag.kind is Kind.SWITCH:
            value: Any = not str(option_string).startswith("--no-")
        elif flag.kind is Kind.LIST:
            value = flag.check(list(values))
        elif flag.kind is Kind.APPEND:
            value = flag.check([*(getattr(namespace, self.dest) or ()), values])
        else:
            value = flag.parse(values)
        setattr(namespace, self.dest, value)


class FlexibleArgumentParser(argparse.ArgumentParser):
    """A parser of ``Flag`` options; plain ``add_argument`` works too.

    Args:
        grouped_help: bare ``--help`` names the groups only; ``--help=GroupName``,
            ``--help=flag-name`` and ``--help=all`` print options.
    """

    def __init__(self, *args: Any, grouped_help: bool = False, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.grouped_help = grouped_help
        self.flags: dict[str, Flag] = {}
        self._refused: dict[str, NotYet] = {}
        self._gone: dict[str, str] = {}
        self._groups: dict[str, argparse._ArgumentGroup] = {}

    def add_flag(self, flag: Flag) -> None:
        """Add one option; a second one of the same name is the first."""
        if flag.name in self.flags:
            return
        self.flags[flag.name] = flag
        options = [flag.option, *([flag.short] if flag.short else [])]
        settings: dict[str, Any] = {
            "dest": flag.name,
            "default": copy.copy(flag.default),
            "help": _help_text(flag),
            "action": _StoreFlag,
            "flag": flag,
        }
        if flag.kind is Kind.SWITCH:
            options.append("--no-" + flag.option.removeprefix("--"))
            settings["nargs"] = 0
        else:
            settings["metavar"] = _metavar(flag)
        if flag.kind is Kind.LIST:
            settings["nargs"] = "+"
        self._group(flag.group).add_argument(*options, **settings)

    def refuse(self, entries: Iterable[NotYet]) -> None:
        """Refuse these options by name, except with values that ask for nothing."""
        for entry in entries:
            if entry.name in self.flags:
                continue
            for spelling in (entry.option, entry.short):
                if spelling:
                    self._refused[spelling] = entry
            self._group(entry.group)

    def refuse_gone(self, advice: Mapping[str, str]) -> None:
        """Answer options that vLLM had once with what to do now: ``{"task": "use --runner"}``."""
        self._gone.update(("--" + name, text) for name, text in advice.items())

    def _group(self, title: str) -> argparse._ArgumentGroup:
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        return self._groups[title]

    # Parsing

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse, or print what is wrong, one line each, and exit with status 2."""
        argv = list(sys.argv[1:] if args is None else args)
        try:
            self._answer_help(argv)
            parsed, unknown = self.parse_known_args(self._prepare(argv), namespace)
            if unknown:
                raise self._unknown(unknown[0])
        except VLLMValidationError as error:
            self.error(str(error))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print ``message`` alone and exit with status 2."""
        lines = "".join(f"{self.prog}: error: {line}\n" for line in message.splitlines())
        self.exit(2, lines)

    def _prepare(self, argv: list[str]) -> list[str]:
        """``argv`` in the spelling that argparse knows: config file first, JSON merged, last.

        Raises:
            VLLMValidationError: options that are refused or unknown, all of them.
        """
        argv = self._insert_config(argv)
        prepared: list[str] = []
        refusals: list[VLLMValidationError] = []
        json_values: dict[str, dict[str, Any]] = {}
        index = 0
        while index < len(argv):
            token = argv[index]
            index += 1
            if token == "--":
                prepared += [token, *argv[index:]]
                break
            option, path, value = self._split(token)
            if option is None:
                prepared.append(token)
                continue
            following = argv[index] if index < len(argv) else None
            try:
                entry = self._refused_by(option)
                if entry is not None:
                    index += self._pass_or_refuse(entry, option, path, value, following)
                    continue
                flag = self._json_flag(option)
                if flag is None:
                    self._check_known(option, path, token)
            except VLLMValidationError as error:
                refusals.append(error)
                # What follows is most likely its values.
                while index < len(argv) and not argv[index].startswith("-"):
                    index += 1
                continue
            if flag is None:
                prepared.append(option if value is None else f"{option}={value}")
                continue
            if value is None:
                if following is None:
                    raise ConfigError(f"{token} takes a value", parameter=flag.name)
                value = following
                index += 1
            if path:
                _set_dotted(json_values.setdefault(flag.option, {}), path, value, token)
            else:
                json_values[flag.option] = flag.parse(value)
        if len(refusals) == 1:
            raise refusals[0]
        if refusals:
            lines = dict.fromkeys(str(refusal) for refusal in refusals)
            raise UnsupportedError("\n".join(lines), parameter=refusals[0].parameter)
        for option, document in json_values.items():
            prepared[:0] = [option, json.dumps(document)]
        return prepared

    def _split(self, token: str) -> tuple[str | None, str, str | None]:
        """(option, dotted path, value after "=") of a token; option None where it is a value."""
        name, equals, value = token.partition("=")
        if token.startswith("--"):
            base, _, path = name[2:].partition(".")
            option = "--" + base.replace("_", "-")
            return option, path, value if equals else None
        if len(token) < 2 or token[0] != "-" or token[1].isdigit() or token[1] == ".":
            return None, "", None
        base, _, path = name.partition(".")
        if base in self._refused or base in self._option_string_actions:
            return base, path, value if equals else None
        if base[:2] == "-O" and "-O" in self._refused:
            return "-O", "", base[2:].lstrip("=") or None
        return name, "", value if equals else None

    def _refused_by(self, option: str) -> NotYet | None:
        entry = self._refused.get(option)
        if entry is None and option.startswith("--no-"):
            entry = self._refused.get("--" + option.removeprefix("--no-"))
            return entry if entry is not None and not entry.takes_value else None
        return entry

    @staticmethod
    def _pass_or_refuse(
        entry: NotYet, option: str, path: str, value: str | None, following: str | None
    ) -> int:
        """How many of the following tokens belonged to an option that may pass.

        Raises:
            UnsupportedError: it asks for something.
        """
        if not entry.takes_value:
            spelling = entry.option if option == entry.short else option
            if value is None and spelling in entry.off:
                return 0
            raise entry.refusal(option)
        taken = 1 if value is None else 0
        text = following if value is None else value
        if path and entry.off_at_zero and text is not None and entry.is_off(text):
            return taken
        if path or text is None or not entry.is_off(text):
            raise entry.refusal(option)
        return taken

    def _json_flag(self, option: str) -> Flag | None:
        action = self._option_string_actions.get(option)
        flag = getattr(action, "flag", None)
        return flag if flag is not None and flag.kind is Kind.JSON else None

    def _check_known(self, option: str, path: str, token: str) -> None:
        action = self._option_string_actions.get(option)
        if action is None:
            raise self._unknown(token)
        if path:
            raise ConfigError(
                f"{token.partition('=')[0]}: {option} takes no JSON object, so it has no keys",
                parameter=option,
            )

    def _unknown(self, token: str) -> ConfigError:
        name = token.partition("=")[0]
        advice = self._gone.get(name.replace("_", "-"))
        if advice is None and name.startswith("--no-"):
            advice = self._gone.get("--" + name.removeprefix("--no-").replace("_", "-"))
        if advice is not None:
            return ConfigError(f"{name}: vLLM no longer has this; {advice}", parameter=name)
        if not name.startswith("-"):
            return ConfigError(f"unexpected argument {name!r}", parameter=name)
        known = {o.lstrip("-"): o for o in (*self._option_string_actions, *self._refused)}
        guess = nearest(name.lstrip("-").replace("_", "-"), known)
        hint = f"; did you mean {known[guess]}?" if guess else "; see --help"
        return ConfigError(f"unknown option {name}{hint}", parameter=name)

    # Config file

    def _insert_config(self, argv: list[str]) -> list[str]:
        """The options of ``--config FILE`` before all others, so that the others win."""
        if "config" not in self.flags:
            return argv
        rest: list[str] = []
        from_files: list[str] = []
        tokens = iter(argv)
        for token in tokens:
            name, equals, value = token.partition("=")
            if name != "--config":
                rest.append(token)
                continue
            file = value if equals else next(tokens, None)
            if file is None:
                raise ConfigError("--config takes the name of a YAML file", parameter="config")
            from_files += _config_options(file)
        # An option that takes several values must not take a positional argument that follows.
        start = next((i for i, token in enumerate(rest) if token.startswith("-")), len(rest))
        return rest[:start] + from_files + rest[start:]

    # Help

    def _answer_help(self, argv: list[str]) -> None:
        for token in argv:
            if token == "--":
                return
            if token in ("-h", "--help"):
                self.print_overview()
                self.exit(0)
            if token.startswith("--help="):
                sys.stdout.write(self.help_on(token.partition("=")[2]))
                self.exit(0)

    def print_overview(self) -> None:
        """What a bare ``--help`` shows."""
        if not self.grouped_help:
            self.print_help(sys.stdout)
            return
        sys.stdout.write(f"usage: {self.usage or self.prog}\n\n")
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        positionals = [a for a in self._actions if not a.option_strings]
        if positionals:
            formatter.start_section("positional arguments")
            formatter.add_arguments(positionals)
            formatter.end_section()
        sys.stdout.write(formatter.format_help())
        sys.stdout.write("\noption groups:\n")
        for title, group in self._groups.items():
            later = len(self._not_yet_names(title))
            count = f"{len(group._group_actions)} options" + (f", {later} not yet" if later else "")
            sys.stdout.write(f"  {title} ({count})\n")
        sys.stdout.write(
            f"\n{_JSON_NOTE}\n\nMore: --help=GroupName (one group), --help=flag-name (one option, "
            "or all that contain it), --help=all.\n"
        )

    def help_on(self, topic: str) -> str:
        """Help on a group, on one option, or (``all``) on everything.

        Raises:
            ConfigError: there is no such group or option.
        """
        if topic == "all":
            return self.format_help() + f"\n{_JSON_NOTE}\n"
        for title, group in self._groups.items():
            if title.lower() == topic.lower():
                return self._help_on_actions(title, group._group_actions) + self._not_yet(title)
        name = "--" + topic.lower().lstrip("-").replace("_", "-")
        if name in self._refused:
            return f"{self._refused[name].refusal()}\n"
        if name in self._gone:
            return f"{self._unknown(name)}\n"
        exact = self._option_string_actions.get(name)
        if exact is not None:
            return self._help_on_actions("options", [exact])
        containing = [
            action
            for action in self._actions
            if any(name[2:] in option for option in action.option_strings)
        ]
        if containing:
            return self._help_on_actions("options", containing)
        known = [*self._groups, *(option[2:] for option in self._option_string_actions)]
        guess = nearest(topic, known)
        hint = f"did you mean --help={guess}?" if guess else f"groups: {', '.join(self._groups)}"
        raise ConfigError(f"--help={topic}: no such group or option; {hint}", parameter="help")

    def _help_on_actions(self, title: str, actions: Sequence[argparse.Action]) -> str:
        formatter = self._get_formatter()
        formatter.start_section(title)
        formatter.add_arguments(actions)
        formatter.end_section()
        return formatter.format_help()

    def _not_yet_names(self, group: str) -> list[str]:
        return [e.option for s, e in self._refused.items() if e.group == group and s == e.option]

    def _not_yet(self, group: str) -> str:
        names = self._not_yet_names(group)
        if not names:
            return ""
        return f"\nvLLM also has, and this engine does not yet: {', '.join(names)}\n"


def _help_text(flag: Flag) -> str:
    parts = [flag.help]
    if flag.choices:
        parts.append(f"One of: {', '.join(flag.choices)}.")
    if flag.default not in (None, "", [], {}):
        parts.append(f"(default: {flag.default})")
    return " ".join(parts).replace("%", "%%")


def _metavar(flag: Flag) -> str:
    names = {Kind.STR: "TEXT", Kind.INT: "N", Kind.SIZE: "N", Kind.FLOAT: "X", Kind.JSON: "JSON"}
    return names.get(flag.kind, "JSON" if flag.kind is Kind.JSON_LIST else "VALUE")


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _set_dotted(document: dict[str, Any], path: str, text: str, token: str) -> None:
    """Put the value of ``--option.a.b text`` (or ``a.b+``, to a list) into ``document``."""
    append = path.endswith("+")
    keys = path.removesuffix("+").split(".")
    if not all(keys):
        raise ConfigError(f"{token}: a key is empty", parameter=token)
    place = document
    for key in keys[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{token}: {key!r} has a value already", parameter=token)
    value = _json_or_text(text)
    if not append:
        place[keys[-1]] = value
        return
    items = place.setdefault(keys[-1], [])
    if not isinstance(items, list):
        raise ConfigError(f"{token}: {keys[-1]!r} is not a list", parameter=token)
    if isinstance(value, str):
        items.extend(_json_or_text(item) for item in value.split(","))
    else:
        items.append(value)


def _config_options(file: str) -> list[str]:
    """The options that a YAML file names, as command-line tokens.

    Raises:
        ConfigError: the file cannot be read, or is not a mapping of options to values.
    """
    import yaml

    try:
        with open(file, encoding="utf-8") as stream:
            options = yaml.safe_load(stream)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(f"--config {file}: {reason}", parameter="config", value=file) from None
    if options is None:
        return []
    if not isinstance(options, dict):
        raise ConfigError(
            f"--config {file}: expected 'option: value' lines", parameter="config", value=file
        )
    tokens: list[str] = []
    for key, value in options.items():
        option = "--" + str(key).replace("_", "-")
        if option == "--config":
            raise ConfigError(f"--config {file}: config is not allowed in here", parameter="config")
        if isinstance(value, bool):
            tokens.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, dict):
            tokens += [option, json.dumps(value)]
        elif isinstance(value, list):
            tokens += [option, *map(str, value)] if value else []
        elif value is not None:
            tokens.append(f"{option}={value}")
    return tokens
