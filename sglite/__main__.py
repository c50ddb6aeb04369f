"""`python -m sglite`: see `sglite.tools.cli`."""

from sglite.tools.cli import main

raise SystemExit(main())
