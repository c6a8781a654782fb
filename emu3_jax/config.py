"""A run is one dataclass: made by a config file, changed from the command line, kept as JSON."""

import dataclasses
import difflib
import importlib
import inspect
import os
import runpy

from absl import flags
from ml_collections import config_flags

from emu3_jax import untrusted

EXAMPLES = dict(config="configs/demo.py", job="launch/jobs/emu3_8b_stage1.py")
FOLDERS = ("emu3_jax", "tokenizer", "data_pipelines", "inference", "demo", "tests")


def load(argv: list[str], name: str = "config"):
    """The configuration that `--config=FILE[:ARGUMENT] --config.a.b=value ...` asks for.

    FILE defines get_config(), which may take ARGUMENT; with another `name` than config, the flags
    and the function are called after that. Types are those of the dataclass fields. Raises
    ValueError in one line for a missing file, an unknown field (naming the nearest one) or a value
    of the wrong type.
    """
    flag, function = f"--{name}", f"get_{name}"
    paths = [arg.split("=", 1)[1] for arg in argv if arg.startswith(f"{flag}=")]
    if len(paths) != 1:
        raise ValueError(f"want one {flag}=FILE, as in {flag}={EXAMPLES[name]}")
    path, _, argument = paths[0].partition(":")
    if not os.path.isfile(path):
        raise ValueError(f"{flag}={path}: no such file")
    unknown = [arg for arg in argv if not arg.startswith((f"{flag}=", f"{flag}."))]
    if unknown:
        raise ValueError(f"{unknown[0]}: want {flag}=FILE and {flag}.FIELD=VALUE only")
    get_config = runpy.run_path(path).get(function)
    if get_config is None:
        raise ValueError(f"{flag}={path}: it defines no {function}(); see {EXAMPLES[name]}")
    if argument and not inspect.signature(get_config).parameters:
        raise ValueError(f"{flag}={path}:{argument}: its {function}() takes no argument")
    default = get_config(argument) if argument else get_config()
    for arg in argv:
        if arg.startswith(f"{flag}."):
            _check_field(default, arg.split("=", 1)[0])
    values = flags.FlagValues()
    fields = [arg for arg in argv if not arg.startswith(f"{flag}=")]
    try:
        holder = config_flags.DEFINE_config_dataclass(
            name, default, flag_values=values, sys_argv=fields
        )
        values(["launch", *fields])
    except flags.Error as error:
        raise ValueError(f"{str(error).removeprefix('flag ')}") from None
    return values[holder.name].value


def _check_field(config, name: str) -> None:
    """Raises ValueError if `name` (--config.a.b) leads nowhere."""
    node = config
    for key in name.split(".")[1:]:
        if not dataclasses.is_dataclass(node):
            raise ValueError(f"{name}: {type(node).__name__} {node!r} has no fields")
        fields = [field.name for field in dataclasses.fields(node)]
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(fields)}"
            raise ValueError(f"{name}: {type(node).__name__} has no field {key!r}; {hint}")
        node = getattr(node, key)


def to_json(config):
    """A dataclass as JSON values that `from_json` reads back; classes are named by their place."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"class": f"{type(config).__module__}:{type(config).__qualname__}", **fields}
    if isinstance(config, list | tuple):
        return [to_json(value) for value in config]
    if isinstance(config, dict):
        return {key: to_json(value) for key, value in config.items()}
    return config


def differences(old, new, name: str = "") -> list[str]:
    """Where two configurations as JSON values differ: "a.b = old, now new" each."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        parts = ((f"{name}.{key}" if name else key, key) for key in keys)
        return [d for part, key in parts for d in differences(old.get(key), new.get(key), part)]
    return [] if old == new else [f"{name} = {old}, now {new}"]


def from_json(value):
    """What `to_json` wrote, sequences as tuples.

    Raises ValueError for a class that is no dataclass of this project, or has not these fields:
    what a checkpoint says is made of configurations alone, and calls nothing else.
    """
    untrusted.check_depth(value)
    return _from_json(value)


def _from_json(value):
    if isinstance(value, list):
        return tuple(_from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    fields = {key: _from_json(v) for key, v in value.items() if key != "class"}
    if "class" not in value:
        return fields
    try:
        return _class(value["class"])(**fields)
    except TypeError as error:  # fields that the class has not, or of a kind that it cannot take
        raise ValueError(f"config of class {value['class']!r}: {error}") from None


def _class(name: str) -> type:
    """The dataclass of this project that `to_json` calls `name`, MODULE:NAME."""
    module, _, place = name.partition(":") if isinstance(name, str) else ("", "", "")
    if module.split(".")[0] not in FOLDERS:
        raise ValueError(f"config names class {name!r}, which is not of this project")
    try:
        found = getattr(importlib.import_module(module), place, None)
    except ImportError:
        found = None
    ours = isinstance(found, type) and dataclasses.is_dataclass(found)
    if not ours or found.__module__ != module:
        raise ValueError(f"config names class {name!r}, which this version does not have")
    return found
