"""
Walls around a stranger's program: what it may read, write and reach while the referee runs it.

Inside, there is no network, only the given folder can be written, hidden folders are empty, and no process
outlives the program. On Linux that is done with the kernel's namespaces, through util-linux's `unshare`,
which needs no rights where the system allows user namespaces. missing() tries each wall out and says which do
not hold, on macOS all of them.

No wall hides what a program needs to run at all. So it can still read the installed packages, and with them
the text of the `pocket` tracks, which is PyTorch's own source.
"""

import functools
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from audit import run_limited

# Runs inside the new namespaces, as `sh -c WALLS sh FOLDER HIDDEN:HIDDEN... COMMAND...`. Every mount becomes
# read-only but those of the kernel itself; shared memory is private. A mount that refuses is left as it is.
WALLS = """
set -e
folder=$1
mount --make-rprivate /
IFS=:
for path in $2; do mount -t tmpfs -o ro,size=4k none "$path"; done
unset IFS
shift 2
awk '{print $5}' /proc/self/mountinfo | sort -u | while read -r path; do
  case $path in
    /proc*|/sys*|/dev*) ;;
    *) mount -o remount,bind,ro "$path" 2>/dev/null || true ;;
  esac
done
mount -t tmpfs none /dev/shm
mount --bind "$folder" "$folder"
mount -o remount,bind,rw "$folder"
cd "$folder"
mkdir -p .home
export HOME="$folder/.home" TMPDIR="$folder/.home" TORCHINDUCTOR_CACHE_DIR="$folder/.home/inductor"
exec "$@"
"""
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--pid", "--fork", "--kill-child"]

# Prints a word for each wall that does not hold. argv: a file outside, a hidden folder.
PROBE = """
import os, socket, sys
try:
    open(sys.argv[1], "w").close()
    print("writing")
except OSError:
    pass
if os.listdir(sys.argv[2]):
    print("reading")
try:
    socket.create_connection(("192.0.2.1", 9), timeout=0.2).close()
except TimeoutError:
    print("network")
except OSError:
    pass
if os.getpid() != 1:
    print("processes")
"""
EVERY_WALL = ("writing", "reading", "network", "processes")


def walled(command, folder, hidden=()):
    """The command that runs `command` inside walls, in `folder`, where alone it may write. hidden: folders
    that it finds empty. Where the system has no namespaces, the command as it is."""
    if not has_namespaces():
        return list(command)
    hidden = ":".join(str(Path(path).resolve()) for path in hidden if Path(path).is_dir())
    walls = [*UNSHARE, "--mount-proc", "sh", "-c", WALLS, "sh", str(Path(folder).resolve()), hidden]
    return [*walls, *command]


@functools.cache
def has_namespaces():
    if shutil.which("unshare") is None:
        return False
    status, _ = run_limited([*UNSHARE, "--mount-proc", "true"], 60)
    return status == 0


@functools.cache
def missing():
    """The walls that do not hold on this machine, of EVERY_WALL, each of which is tried out."""
    if not has_namespaces():
        return EVERY_WALL
    with tempfile.TemporaryDirectory() as tmp:
        inside = Path(tmp) / "inside"
        secret = Path(tmp) / "secret"
        inside.mkdir()
        secret.mkdir()
        (secret / "file").write_text("secret")
        said = inside / "said"
        probe = [sys.executable, "-c", PROBE, str(Path(tmp) / "outside"), str(secret)]
        command = ["sh", "-c", 'said=$1; shift; exec "$@" >"$said"', "sh", str(said), *probe]
        status, _ = run_limited(walled(command, inside, [secret]), 60)
        if status != 0:
            return EVERY_WALL
        return tuple(said.read_text().split())


def words():
    """One line for a reader: which walls there are."""
    gone = missing()
    if not gone:
        return "no network, nothing written outside its folder, the data hidden, no process left behind"
    return (
        f"WITHOUT walls for {', '.join(gone)}: this system does not allow them; run strangers' code elsewhere"
    )
