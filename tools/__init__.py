"""The command line and what it needs; uses nothing but fastlora's public API."""
