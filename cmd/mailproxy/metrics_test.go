package main

import (
	"reflect"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"mailproxy/smtpd"
)

func TestAllThatSMTPCountsIsShown(t *testing.T) {
	var s smtpd.Stats
	fields := reflect.ValueOf(&s).Elem()
	want := map[float64]string{}
	for i := range fields.NumField() {
		f, value := fields.Field(i), 100+i
		switch f.Kind() {
		case reflect.Int:
			f.SetInt(int64(value))
		case reflect.Uint64:
			f.SetUint(uint64(value))
		default: // the limits, by name
			continue
		}
		want[float64(value)] = fields.Type().Field(i).Name
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(newSMTPCollector(func() smtpd.Stats { return s }))
	shown, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range shown {
		for _, m := range family.GetMetric() {
			delete(want, m.GetCounter().GetValue()+m.GetGauge().GetValue())
		}
	}
	if len(want) > 0 {
		t.Errorf("not shown: %v", want)
	}
}
