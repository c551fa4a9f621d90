"""The other control networks of diffusers, so that all are trained, measured and used alike.

A new one is one file here, which is named after it, with a subclass of `Baseline`. Each starts as exactly the prior, is
trained alone and leaves the frozen U-Net as it found it:

| network      | reads                 | adds to                                                      |
|--------------|-----------------------|--------------------------------------------------------------|
| ControlNet   | z_t, t, text, c       | the U-Net's skips and its middle block                       |
| ControlNet-XS| z_t, t, text, c, the  | every encoder layer, the middle block, the decoder's inputs  |
|              | base's own features   |                                                              |
| T2I-Adapter  | c                     | the last layer of each encoder level                         |
"""

from pkgutil import iter_modules

BASELINES = tuple(module.name.replace("_", "-") for module in iter_modules(__path__) if not module.name.startswith("_"))
"""Their names in a configuration."""
