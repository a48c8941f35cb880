package tunnel

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/crypto/ssh"
)

// keyFiles are what a backup takes of the key directory, in the order in which they are put back: what says who the node is comes last.
func keyFiles() []string {
	return []string{trustFile, hostCertFile, userCertFile, caKeyFile, nodeKeyFile, identityFile}
}

// ReadKeyFiles gives the files of the key directory by name, for a backup; those that are not there are left out.
func ReadKeyFiles(dir string) (map[string][]byte, error) {
	files := map[string][]byte{}
	d, err := openKeyDirToRead(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return files, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.close()
	for _, name := range keyFiles() {
		text, err := d.read(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		files[name] = text
	}
	return files, nil
}

// CheckKeyFiles gives the identity that the files of a key directory make, from ReadKeyFiles; members are left out. ErrBadKey or
// ErrBadCertificate where they do not fit together.
func CheckKeyFiles(files map[string][]byte) (Identity, error) {
	var id Identity
	if err := json.Unmarshal(files[identityFile], &id); err != nil {
		return id, fmt.Errorf("%s: %w", identityFile, err)
	}
	id.Certs = Certs{Host: string(bytes.TrimSpace(files[hostCertFile])), User: string(bytes.TrimSpace(files[userCertFile]))}
	signer, err := ssh.ParsePrivateKey(files[nodeKeyFile])
	if err != nil {
		return id, fmt.Errorf("%s: %w", nodeKeyFile, ErrBadKey) // the parser's error may quote the file
	}
	return id, id.fits(signer.PublicKey())
}

// PrivateKeyOf gives the node's key of the files of a key directory, from ReadKeyFiles; ErrBadKey where they have none.
func PrivateKeyOf(files map[string][]byte) (ed25519.PrivateKey, error) {
	parsed, err := ssh.ParseRawPrivateKey(files[nodeKeyFile])
	private, ok := parsed.(*ed25519.PrivateKey)
	if err != nil || !ok {
		return nil, fmt.Errorf("%s: %w", nodeKeyFile, ErrBadKey) // the parser's error may quote the file
	}
	return *private, nil
}

// WriteKeyFiles puts the files of a key directory back, durably, in place of what is there; they must pass CheckKeyFiles. One that dies
// in between leaves a node without an identity, and can be run again.
func WriteKeyFiles(dir string, files map[string][]byte) error {
	if _, err := CheckKeyFiles(files); err != nil {
		return err
	}
	if err := RemoveIdentity(dir); err != nil {
		return fmt.Errorf("remove the identity before: %w", err)
	}
	d, err := openKeyDir(dir)
	if err != nil {
		return fmt.Errorf("open key directory: %w", err)
	}
	defer d.close()
	for _, name := range keyFiles() {
		if text, ok := files[name]; ok {
			if err := d.write(name, text); err != nil {
				return fmt.Errorf("write %s: %w", name, err)
			}
		}
	}
	return nil
}
