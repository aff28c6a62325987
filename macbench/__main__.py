"""``python -m macbench`` and the command ``macbench``: the same as ``python -m macbench.run``."""

from macbench import interrupt


def main() -> None:
    interrupt.exit_at_once()
    from macbench.run import main as run

    run()


if __name__ == "__main__":
    main()
