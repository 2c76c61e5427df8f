"""``flexkv doctor``: gathers facts and judges them. It never repairs, and serving code never imports it."""
