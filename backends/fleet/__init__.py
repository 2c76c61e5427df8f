"""Other machines: wire, reader, server, members and their sets of pages, RDMA.

No rank-side decisions (``sharing``) and no slot files (``backends/slots``).
"""
