"""Raw files to a manifest: finding, decoding, measuring, filtering, captioning, reporting."""
