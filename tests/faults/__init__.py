"""What kills, full disks and broken mounts do: `make test-faults`, as root on Linux."""
