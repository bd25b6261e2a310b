"""Run a compiler, keep what it says in a file, show it where it fails: compile.py LOG COMMAND..."""

import subprocess
import sys
from pathlib import Path

log, *command = sys.argv[1:]
Path(log).parent.mkdir(parents=True, exist_ok=True)
result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
Path(log).write_text(result.stdout)
if result.returncode or "warning" in result.stdout:
    print(result.stdout)
sys.exit(result.returncode)
