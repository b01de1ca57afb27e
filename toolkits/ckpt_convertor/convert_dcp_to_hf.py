"""Write the model of a checkpoint as a Hugging Face directory. The code is `rlinf_lite.export.dcp_to_hf`."""

import sys

from rlinf_lite.export.dcp_to_hf import main

if __name__ == "__main__":
    sys.exit(main())
