"""Probes of the private APIs in `fastlora.compat`: each uses an API, and fails if it behaves differently than expected.

`run.failures()` runs all of them. Each module of `compat` has a module of probes, with a probe for each name.
"""
