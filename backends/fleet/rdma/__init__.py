"""Optional RDMA transports: NIXL, Mooncake.

``fleet/transport.py`` loads the one that ``share.engine`` names; no module imports this package.
"""
