"""From a Hydra config to checked dataclasses, and from any bad input to one sentence and exit code 2.

YAML files under `configs/` hold the defaults and their comments; a program's dataclass holds the types. Keys that the
dataclass does not know, and values of the wrong type, are refused before anything starts.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from bcr.runtime.stop import RunStopped, Terminated, first_here

Config = TypeVar("Config")
Prepared = TypeVar("Prepared")

BAD_INPUT = 2
STOPPED = 1


def config_folder() -> Path:
    """`configs/`: inside the package when installed as a wheel, beside it in a checkout."""
    inside = Path(__file__).parent.parent / "configs"
    return inside if inside.is_dir() else inside.parent.parent / "configs"


def launch(
    name: str,
    schema: type[Config],
    prepare: Callable[[Config], Prepared],
    run: Callable[[Prepared], None],
    config_name: str | None = None,
    ranks: bool = False,
) -> None:
    """The main of a program: compose `configs/<name>.yaml` (or `config_name`) with the command line, check, then work.

    `prepare` makes every check and builds what the run needs; a ValueError or OSError there is the user's to mend: one sentence on
    stderr and exit code 2. `run` does the expensive part; an OSError there (a full disk, say) or a RunStopped also ends in one sentence,
    exit code 1. With `ranks` torchrun may start many processes, which find the same wrong; of each machine the first says so.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra's errors reach us instead of its own printing and exit
    composed: list[DictConfig] = []
    place = config_folder() / (config_name or name)
    main = hydra.main(version_base="1.3", config_path=str(place.parent), config_name=place.name)(composed.append)
    try:
        main()
        if not composed:
            return  # --help, --cfg and the like: Hydra has answered
        if len(composed) > 1:
            raise ValueError(f"--multirun asks for {len(composed)} runs in one process; start them one by one.")
        if not ranks and os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError(f"torchrun started {os.environ['WORLD_SIZE']} processes; this program runs in one.")
        prepared = prepare(typed(composed[0], schema))
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        fail(name, one_sentence(error), BAD_INPUT, alike=True)
    try:
        run(prepared)
    except RunStopped as error:
        fail(name, f"stopped: {error}", STOPPED, alike=True)
    except MemoryError as error:
        fail(name, f"stopped: {error}", STOPPED)
    except OSError as error:
        fail(name, f"stopped: {one_sentence(error)} What was written before stands, the last checkpoint too.", STOPPED)
    except Terminated:
        fail(name, "terminated.", 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        fail(name, "interrupted.", 128 + signal.SIGINT)


def command_line(program: str) -> str:
    """The command that started this process, if it was that program; else the program's name alone (the config says the rest)."""
    ours = Path(sys.argv[0]).name == f"{program}.py"
    return shlex.join(["python", "-m", f"bcr.{program}", *(sys.argv[1:] if ours else [])])


def typed(config: DictConfig, schema: type[Config]) -> Config:
    """The config as an instance of `schema`; ValueError naming the key for unknown keys and wrong types."""
    if missing := sorted(OmegaConf.missing_keys(config)):  # looked up before the merge, where a default would take their place
        raise ValueError(f"{missing[0]} has no default; give it as {missing[0]}=... .")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), config))  # type: ignore[return-value]


def compose(name: str, overrides: list[str], schema: type[Config]) -> Config:
    """The same from Python: for tests, the demo and the study."""
    place = config_folder() / name
    with hydra.initialize_config_dir(str(place.parent), version_base="1.3"):
        return typed(hydra.compose(place.name, overrides), schema)


def one_sentence(error: Exception) -> str:
    """What is wrong, in one line, without Hydra's and OmegaConf's trailers."""
    cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
    if isinstance(cause, OSError) and not isinstance(cause, HydraException):
        return f"{cause.filename or 'output'}: {cause.strerror}." if cause.strerror else f"{cause}."
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    trailers = ("full_key:", "object_type=", "reference_type=", "Config search path:", "provider=", "Set the environment variable")
    kept = [line for line in lines if not line.startswith(trailers)]
    key = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return f"{key} is no key of this config; --cfg job prints all there are."
    text = " ".join(kept)
    return f"{key}: {text}" if key and key not in text else text


def fail(program: str, sentence: str, code: int, alike: bool = False) -> NoReturn:
    """`alike`: all ranks fail so, and one sentence is enough."""
    if not alike or first_here():
        print(f"bcr.{program}: {sentence}", file=sys.stderr)
    sys.exit(code)


def as_plain(config: Any) -> dict[str, Any]:
    """A dataclass config as plain containers, to be written beside a run's results."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)  # type: ignore[return-value]
