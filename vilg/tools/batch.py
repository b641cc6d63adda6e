"""Batch jobs: a script of launch/ with its options and arguments filled in, and the commands of SLURM that take it."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from vilg.errors import UserError

_DIRECTIVE = re.compile(r"#SBATCH --([\w-]+)")


def render(
    template: str, options: Mapping[str, str | None], variables: Mapping[str, str], arguments: Sequence[str]
) -> str:
    """The batch script with these options of sbatch (None: one without a value), exported variables and arguments.

    An option replaces the template's line of the same name; the others of the template stay.
    """
    lines = template.splitlines()
    shebang, body = lines[0], lines[1:]
    kept = [line for line in body if not ((found := _DIRECTIVE.match(line)) and found[1] in options)]
    given = {name: "" if value is None else f"={shlex.quote(value)}" for name, value in options.items()}
    directives = [f"#SBATCH --{name}{value}" for name, value in given.items()]
    # Directives end at the first command, so that all go before it.
    first = next((i for i, line in enumerate(kept) if line and not line.startswith("#")), len(kept))
    filled = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    filled.append(f"set -- {shlex.join(arguments)}")
    return "\n".join([shebang, *kept[:first], *directives, *filled, *kept[first:]]) + "\n"


def partitions() -> list[str]:
    """Names of the cluster's partitions. Raises UserError where there is no SLURM, or it does not answer."""
    return sorted(set(_call(["sinfo", "--noheader", "--format=%R"]).split()))


def test_only(script: str, extra: Sequence[str]) -> str:
    """When and where SLURM would start the script. Raises UserError with SLURM's own words if it never would."""
    return _call(["sbatch", "--test-only", *extra], script, said_on_stderr=True).removeprefix("sbatch: ").strip()


def sbatch(script: str, extra: Sequence[str]) -> str:
    """Submit a script; the job's number. Raises UserError with SLURM's own words if it is refused."""
    return _call(["sbatch", "--parsable", *extra], script).strip().split(";")[0]


def _call(command: Sequence[str], script: str | None = None, *, said_on_stderr: bool = False) -> str:
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} is not found: this machine is no login node of a SLURM cluster; --dry-run needs none, and "
            "launch/local.sh trains on one machine"
        )
    done = subprocess.run(command, input=script, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip())
        raise UserError(f"{command[0]}: {said.replace(f'{command[0]}: ', '').replace('error: ', '')}")
    return done.stderr if said_on_stderr else done.stdout


def script_template(name: str) -> str:
    """A script of launch/, from the repository that the command is started in. Raises UserError elsewhere."""
    path = Path("launch") / name
    if not path.exists():
        raise UserError(f"{path} is not here ({Path.cwd()}); start from the repository, as jobs do")
    return path.read_text(encoding="utf-8")
