"""A real Slurm of one node, made of Debian's packages in a temporary folder, for tests.

As root where apt works, the packages are installed when they are missing. Nothing outside the
folder is configured; the daemons are children of this process and end with it.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from waiting import HANG, until

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel")

# A requeued job waits for cred_expire seconds; below 5, that means the default of 120.
CONFIG = """
ClusterName=graftlens
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
KillWait=1
SchedulerParameters=sched_interval=2,batch_sched_delay=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4096 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class UnavailableError(Exception):
    """There can be no Slurm here; the message says exactly why."""


@dataclass(frozen=True)
class Slurm:
    """A running cluster.

    Attributes:
        folder: its configuration, state and logs.
    """

    folder: Path

    def run(self, *command: str) -> str:
        """A command's output."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def tasks(self, job: str) -> dict[str, str]:
        """Task id -> state, as the queue shows them."""
        rows = self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i|%T")
        return dict(row.split("|") for row in rows.split())

    def worker(self, task: str) -> int | None:
        """The process id of a task's Python, if it runs."""
        array, _, index = task.partition("_")
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                values = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended
            if command[1:4] != [b"-u", b"-m", b"submitit.core._submit"]:
                continue
            wanted = (
                {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={index}"}
                if index
                else {f"SLURM_JOB_ID={array}"}
            )
            if {text.encode() for text in wanted} <= set(values):
                return int(folder.name)
        return None

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        tails = []
        for log in sorted(self.folder.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-8:]
            tails.append("\n".join([f"{log.name}:", *lines]))
        return "\n".join(tails)


@contextlib.contextmanager
def slurm() -> Iterator[Slurm]:
    """Set up a cluster, with SLURM_CONF in the environment; stop it whatever happens.

    Raises:
        UnavailableError: it cannot be done here.
    """
    if sys.platform != "linux":
        raise UnavailableError(f"Slurm runs on Linux, and this is {sys.platform}")
    if os.geteuid() != 0:
        raise UnavailableError("Slurm's daemons are started as root, and this user is not root")
    _install()
    # A short path: a socket's may have no more than 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        cluster = Slurm(folder)
        _configure(folder)
        _start(cluster, daemons)
        yield cluster
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            subprocess.run(["scancel", "--user=root"], timeout=HANG, capture_output=True)
            until(lambda: not cluster.run("squeue", "-h"), cluster.logs)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(HANG)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


def _install() -> None:
    # Debian keeps daemons where a user's PATH does not look.
    for place in ("/usr/sbin", "/sbin"):
        if place not in os.environ["PATH"].split(os.pathsep):
            os.environ["PATH"] += os.pathsep + place
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise UnavailableError(
            f"{', '.join(missing)} are not installed, and there is no apt-get to install them"
        )
    # RUNLEVEL keeps the packages from starting daemons of their own.
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    install = ("apt-get", "install", "-y", "--no-install-recommends", *PACKAGES)
    said = ""
    for command in (install, ("apt-get", "update"), install):
        try:
            done = subprocess.run(
                [*command, "-o", "DPkg::Lock::Timeout=60", "-o", "Acquire::Retries=2"],
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=HANG,
            )
        except subprocess.TimeoutExpired:
            raise UnavailableError(f"{' '.join(command)} did not end") from None
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        missing = [name for name in COMMANDS if shutil.which(name) is None]
        if not missing:
            return
    raise UnavailableError(
        f"{', '.join(missing)} are not installed, and `{' '.join(install)}` said: {said}"
    )


def _configure(folder: Path) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]
    config = CONFIG.format(
        host=socket.gethostname().split(".")[0], controller=ports[0], node=ports[1], folder=folder
    )
    (folder / "slurm.conf").write_text(config)
    said = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, timeout=HANG).stdout
    release = tuple(int(part) for part in said.split()[-1].split(".")[:2])
    if release >= (23, 11):  # looks for systemd and cgroups even where nothing uses them
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")


def _start(cluster: Slurm, daemons: list[subprocess.Popen[bytes]]) -> None:
    folder = cluster.folder
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
    munged = [f"--{option}={folder}/munge.{file}" for option, file in files.items()]
    ready: dict[tuple[str, ...], Callable[[], bool]] = {
        ("munged", "--foreground", "--force", *munged): (folder / "munge.socket").is_socket,
        ("slurmctld", "-D", "-c"): lambda: _answers("ping"),
        ("slurmd", "-D"): lambda: _answers("show", "node", said="State=IDLE"),
    }
    for command, is_ready in ready.items():
        with (folder / f"{command[0]}.log").open("wb") as log:
            daemon = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent,
            )
        daemons.append(daemon)
        _await(command[0], daemon, is_ready, cluster)


def _await(
    name: str, daemon: "subprocess.Popen[bytes]", is_ready: Callable[[], bool], cluster: Slurm
) -> None:
    until(lambda: is_ready() or daemon.poll() is not None, cluster.logs, every=0.1)
    if daemon.poll() is not None:
        raise UnavailableError(f"{name} does not start:\n{cluster.logs()}")


def _answers(*question: str, said: str = "UP") -> bool:
    try:
        done = subprocess.run(["scontrol", *question], capture_output=True, text=True, timeout=HANG)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and said in done.stdout


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    began = time.monotonic()
    with slurm() as cluster:
        print(cluster.run("sinfo"), f"{time.monotonic() - began:.1f} s")
