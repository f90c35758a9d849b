"""`python -m jaxgen`: the command `jaxgen`."""

from jaxgen.cli import command

if __name__ == "__main__":
    command()
