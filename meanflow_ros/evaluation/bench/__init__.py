"""The `bench` command: how long an inference takes, where the time goes, and what bounds it."""
