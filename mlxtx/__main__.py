"""``python -m mlxtx`` is ``mlxtx``."""

from mlxtx.cli import main

raise SystemExit(main())
