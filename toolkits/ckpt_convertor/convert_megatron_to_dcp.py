"""Write a checkpoint in Megatron's layout as one in DCP shards. The code is `rlinf_lite.export.megatron_to_dcp`."""

import sys

from rlinf_lite.export.megatron_to_dcp import main

if __name__ == "__main__":
    sys.exit(main())
