"""`python -m r3lib` is the command `r3`."""

from .cli import main

raise SystemExit(main())
