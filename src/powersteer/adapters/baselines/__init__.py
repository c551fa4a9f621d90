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
