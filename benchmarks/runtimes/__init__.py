"""Programs that run language models, side by side: how each is set up, and how each is driven.

    workshop, weights   environments of their own, and the same numbers in each one's format
    make_<name>         what it takes to run <name>: install, convert, say how
    worker              one process that measures one of them
    run_<name>          <name> behind the worker's interface; imports nothing of the others

Workers run in foreign environments, so this file and `measure` need the standard library alone.
"""
