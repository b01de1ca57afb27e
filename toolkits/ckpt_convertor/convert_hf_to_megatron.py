"""Write the weights of a Hugging Face directory as a checkpoint in Megatron's layout.

The code is `rlinf_lite.export.hf_to_megatron`.
"""

import sys

from rlinf_lite.export.hf_to_megatron import main

if __name__ == "__main__":
    sys.exit(main())
