"""What a process of helpers.run does. It imports nothing, so that the script's own imports are as in a new one."""
import os
import runpy
import signal
import sys


def run_script(script, argv, cwd, environment, stdout, stderr):
    """Run a script as the command line would: its folder, arguments, environment, and files for what it says."""
    for stream, path in (sys.stdout, stdout), (sys.stderr, stderr):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)             # which what runs in the background has not
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv[:] = [script, *argv]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name='__main__')
