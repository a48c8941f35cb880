package relay

import "mailproxy/mail"

// appendMailDSN appends to MAIL what the sender wants to hear, as it said it (RFC 3461 §5.2.1).
func appendMailDSN(b []byte, e *mail.Envelope) []byte {
	if e.Return != "" {
		b = append(append(b, " RET="...), e.Return...)
	}
	if e.EnvID != "" {
		b = mail.AppendXtext(append(b, " ENVID="...), e.EnvID)
	}
	return b
}

// appendRcptDSN appends it to RCPT.
func appendRcptDSN(b []byte, p mail.RcptParams) []byte {
	if p.Notify != 0 {
		b = append(append(b, " NOTIFY="...), p.Notify.String()...)
	}
	if p.Original != "" {
		b = mail.AppendOriginal(append(b, " ORCPT="...), p.Original)
	}
	return b
}
