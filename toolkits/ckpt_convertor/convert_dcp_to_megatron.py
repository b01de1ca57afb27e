"""Write a checkpoint in DCP shards as one in Megatron's layout. The code is `rlinf_lite.export.dcp_to_megatron`."""

import sys

from rlinf_lite.export.dcp_to_megatron import main

if __name__ == "__main__":
    sys.exit(main())
