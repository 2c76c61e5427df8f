"""Other machines: wire, reader, server, members and their sets of pages, RDMA.

Single modules, for all of these: ``vocabulary`` (types), ``transport`` (RDMA), ``slabs`` (staging memory), ``partner``
(does the other side answer?). No rank-side decisions (``sharing``) and no slot files (``backends/slots``).
"""
