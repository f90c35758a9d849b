"""What a program of a test begins with that is to die before one of its steps on the file system."""

# STEPS are the events that count, as auditing names them, and "fsync"; once `left` is a number, so many are left.
DIES = """
import os, signal, sys

left = None

def step(event, arguments):
    global left
    if left is not None and event in STEPS:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sync = os.fsync
os.fsync = lambda descriptor: (step("fsync", ()), sync(descriptor))
sys.addaudithook(step)
"""
