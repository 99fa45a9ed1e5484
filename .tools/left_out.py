# SPDX-License-Identifier: Apache-2.0
"""Say what the tests on one Python leave to tox's other environments, for someone who has no other Python.

tox.ini names the Python's own environment, then all of them.
"""

import sys

_, own, *environments = sys.argv
others = ", ".join(f"{name[2]}.{name[3:]}" for name in environments if name != own)
print(f"Left out by {own}, to be run by the other environments of `tox`:")
print(f"- the tests on Python {others}")
print("- `coverage`: all Pythons together must cover every line and branch; the figure above is that of one")
print("- `package`: what would be published is built, installed and used, in fresh environments")
