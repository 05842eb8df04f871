"""`fastlora zoo`: train a tiny model of each architecture in the installed transformers, eager and compiled."""
