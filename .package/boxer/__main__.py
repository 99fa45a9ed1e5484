# SPDX-License-Identifier: Apache-2.0
"""`python -m boxer`: the same program as `boxer` and `python boxer.py`."""

from boxer import main

raise SystemExit(main())
