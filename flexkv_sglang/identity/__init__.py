"""Identity: page keys, namespaces, fingerprints of weights, and the weights of this process now.

A difference in the identity is another namespace, and so a miss. No SGLang: ``integration`` fills the fields.
"""
