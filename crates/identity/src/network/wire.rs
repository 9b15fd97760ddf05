//! The network section as bytes.

use std::net::{IpAddr, SocketAddr};

use super::{Inet, MAX_DNS, MAX_SEARCH, MAX_SECTION, MacAddress, Network, NetworkError};
use crate::wire::{Malformed, Reader, push, push_len, push_u32};

impl Network {
    /// The section as bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(256);
        self.write(&mut bytes);
        bytes
    }

    /// Reads and checks a section that stands alone.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NetworkError> {
        let malformed = |rest: &[u8]| NetworkError::Malformed { at: bytes.len() - rest.len() };
        if bytes.len() > MAX_SECTION {
            return Err(NetworkError::Malformed { at: MAX_SECTION });
        }
        let mut reader = Reader { rest: bytes };
        let network = Self::read(&mut reader).map_err(|Malformed| malformed(reader.rest))?;
        if !reader.rest.is_empty() {
            return Err(malformed(reader.rest));
        }
        network.check().map(|()| network)
    }

    pub(crate) fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.mac.octets());
        push_u32(bytes, u32::from(self.mtu));
        push_inet(bytes, self.ipv4.as_ref(), |bytes, address| bytes.extend_from_slice(&address.octets()));
        push_inet(bytes, self.ipv6.as_ref(), |bytes, address| bytes.extend_from_slice(&address.octets()));
        push_u32(bytes, u32::from(self.gateway_mac.is_some()));
        bytes.extend(self.gateway_mac.iter().flat_map(|mac| mac.octets()));
        push_len(bytes, self.dns.len());
        self.dns.iter().for_each(|address| push_ip(bytes, *address));
        push_len(bytes, self.search.len());
        self.search.iter().for_each(|domain| push(bytes, domain.as_bytes()));
        push_u32(bytes, u32::from(self.ack.is_some()));
        if let Some(ack) = self.ack {
            push_ip(bytes, ack.ip());
            push_u32(bytes, u32::from(ack.port()));
        }
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            mac: mac(reader)?,
            mtu: reader.u32()?.try_into().map_err(|_| Malformed)?,
            ipv4: inet(reader, |reader| reader.array::<4>().map(Into::into))?,
            ipv6: inet(reader, |reader| reader.array::<16>().map(Into::into))?,
            gateway_mac: if reader.flag()? { Some(mac(reader)?) } else { None },
            dns: list(reader, MAX_DNS, ip)?,
            search: list(reader, MAX_SEARCH, |reader| reader.text().map(str::to_owned))?,
            ack: if reader.flag()? {
                Some(SocketAddr::new(ip(reader)?, reader.u32()?.try_into().map_err(|_| Malformed)?))
            } else {
                None
            },
        })
    }
}

fn push_inet<A>(bytes: &mut Vec<u8>, inet: Option<&Inet<A>>, push_address: impl Fn(&mut Vec<u8>, &A)) {
    push_u32(bytes, u32::from(inet.is_some()));
    if let Some(inet) = inet {
        push_address(bytes, &inet.address);
        push_u32(bytes, u32::from(inet.prefix));
        push_u32(bytes, u32::from(inet.gateway.is_some()));
        inet.gateway.iter().for_each(|gateway| push_address(bytes, gateway));
    }
}

fn push_ip(bytes: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(address) => push(bytes, &address.octets()),
        IpAddr::V6(address) => push(bytes, &address.octets()),
    }
}

fn mac(reader: &mut Reader<'_>) -> Result<MacAddress, Malformed> {
    MacAddress::new(reader.array()?).map_err(|_| Malformed)
}

fn inet<A>(
    reader: &mut Reader<'_>,
    address: impl Fn(&mut Reader<'_>) -> Result<A, Malformed>,
) -> Result<Option<Inet<A>>, Malformed> {
    if !reader.flag()? {
        return Ok(None);
    }
    Ok(Some(Inet {
        address: address(reader)?,
        prefix: reader.u32()?.try_into().map_err(|_| Malformed)?,
        gateway: if reader.flag()? { Some(address(reader)?) } else { None },
    }))
}

fn ip(reader: &mut Reader<'_>) -> Result<IpAddr, Malformed> {
    let bytes = reader.bytes()?;
    if let Ok(address) = <[u8; 4]>::try_from(bytes) {
        return Ok(address.into());
    }
    <[u8; 16]>::try_from(bytes).map(Into::into).map_err(|_| Malformed)
}

fn list<T>(
    reader: &mut Reader<'_>,
    most: usize,
    entry: impl Fn(&mut Reader<'_>) -> Result<T, Malformed>,
) -> Result<Vec<T>, Malformed> {
    let count = reader.count()?;
    if count > most {
        return Err(Malformed);
    }
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        entries.push(entry(reader)?);
    }
    Ok(entries)
}
