"""Work shared by processes on any number of hosts: a queue of files with claims, leases and results; workers."""
