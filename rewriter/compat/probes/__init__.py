"""A probe for each private API in `fastlora.compat`: it uses the API, and fails if that no longer means the same.

`run.failures()` runs all of them. There is one module of probes for each module of `compat`, and one probe for each of
its names.
"""
