"""Data: prompt sets, images, Lightning data modules and small embedded assets (imported as ``obsdiff.data``)."""
