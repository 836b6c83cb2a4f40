"""The attempts of each kind of attacker, and their expected outcomes.

An attempt is a name, something that is done, and the answers that are as they should be. Most attempts are generated from
the catalogue (every RPC × every hostile argument, every table × every verb), so that what is new is attacked by itself.
After all attempts of an attacker `scene.Scene.findings` looks with the owner's eyes at what they must not have changed.
"""
