"""Identity of pages: keys, namespaces, fingerprints of weights, epochs of weight updates.

No SGLang in here: ``integration`` collects the facts that these digests cover.
"""
