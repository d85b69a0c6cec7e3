"""Primitives that several options share: a readable reference beside each faster path, one public function per job."""
