"""Write a checkpoint in Megatron's layout for another tensor-parallel size.

The code is `rlinf_lite.export.megatron_to_megatron`.
"""

import sys

from rlinf_lite.export.megatron_to_megatron import main

if __name__ == "__main__":
    sys.exit(main())
