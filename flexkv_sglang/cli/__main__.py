"""``python -m flexkv_sglang.cli``."""

import sys

from flexkv_sglang.cli.main import main

sys.exit(main())
