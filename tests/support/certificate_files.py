"""Certificate, key and CA in files, as an operator or cert-manager puts them there."""

from __future__ import annotations

from pathlib import Path

import trustme

from quire.service.tls_files import PeerTlsFiles, TlsFiles


def new_ca() -> trustme.CA:
    """An authority of its own."""
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


def leaf(ca: trustme.CA, *names: str) -> trustme.LeafCert:
    """A certificate for `names`, or for this machine."""
    return ca.issue_cert(*(names or ("127.0.0.1", "localhost")), key_type=trustme.KeyType.ECDSA)


class CertificateFiles:
    """One pair, shown to clients and to servers alike, and the CA that checks the other side."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.certificate, self.key, self.ca = folder / "tls.crt", folder / "tls.key", folder / "ca.crt"

    def write(self, ca: trustme.CA, *names: str) -> CertificateFiles:
        """A new pair that `ca` signed, and `ca` itself, one file after the other: between them they don't fit."""
        pair = leaf(ca, *names)
        self.certificate.write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
        self.key.write_bytes(pair.private_key_pem.bytes())
        self.ca.write_bytes(ca.cert_pem.bytes())
        return self

    def of_server(self) -> TlsFiles:
        """For a server that asks for client certificates."""
        return TlsFiles(str(self.certificate), str(self.key), str(self.ca))

    def of_client(self, peer: str, name: str = "") -> PeerTlsFiles:
        """For the client of such a server."""
        return PeerTlsFiles(peer, str(self.ca), str(self.certificate), str(self.key), name)

    def flags(self, prefix: str) -> list[str]:
        """For processes; `prefix` is tls, router-tls or engine-tls."""
        ca = "tls-client-ca" if prefix == "tls" else f"{prefix}-ca"
        return [f"--{prefix}-cert={self.certificate}", f"--{prefix}-key={self.key}", f"--{ca}={self.ca}"]
