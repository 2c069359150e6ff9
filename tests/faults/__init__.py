"""Killed processes, full disks and broken mounts: `make test-faults`, as root on Linux."""
