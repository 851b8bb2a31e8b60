"""`heal bench`: speed of decoding and training, beside other tools and the machine's own limits, in one run."""
